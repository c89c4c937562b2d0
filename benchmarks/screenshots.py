"""Pictures of the pages of a small real run: `python -m benchmarks.screenshots [--out docs] [--runs DIR] [--minutes 3]`.

Trains the digits with `asgd_mpi.poc` (1 and 3 workers, synchronously and asynchronously; finished runs of DIR are taken as
they are), reports and compares the runs, and has a headless Chromium show the pages: on a laptop, light and dark, and on a
phone. Look at them: no test sees what a person sees.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from asgd_mpi import poc, report
from asgd_mpi.errors import ConfigError
from asgd_mpi.process import ending

LAPTOP, PHONE = (1280, 1500), (390, 1700)  # width and height in CSS pixels
DARK = "--blink-settings=preferredColorScheme=0"
NARROWEST = 500  # pixels of a window without one


@ending.of_command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--runs", type=Path, default=Path("runs/screenshots"))
    parser.add_argument(
        "--minutes", type=float, default=3, help="of each of the three runs, at most"
    )
    options = parser.parse_args(arguments)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise ConfigError("there is no chromium and no google-chrome to show the pages with.")
    trained = ["--workers", "1,3", "--minutes", str(options.minutes), "--out", str(options.runs)]
    # the checkpoints that it keeps are on the page; so few epochs that the runs finish
    if status := poc.main([*trained, "--", "--epochs", "20", "--run.validate_every", "0.5"]):
        return status
    run = options.runs / "async-3"
    report.main([str(run)])
    page, comparison = run / "report/report.html", options.runs / "comparison/comparison.html"
    options.out.mkdir(parents=True, exist_ok=True)
    shoot(browser, page, options.out / "report-light.png", LAPTOP)
    shoot(browser, page, options.out / "report-dark.png", LAPTOP, DARK)
    shoot(browser, page, options.out / "report-phone.png", PHONE)
    shoot(browser, comparison, options.out / "comparison-dark.png", LAPTOP, DARK)
    shoot(browser, comparison, options.out / "comparison-phone.png", PHONE)
    return 0


def shoot(browser: str, page: Path, out: Path, size: tuple[int, int], *flags: str) -> None:
    """Write a picture of the top of a page, with 256 colours, as a browser of that size shows it."""
    width, height = size
    with tempfile.TemporaryDirectory(prefix="asgd_mpi_pages_") as place:
        frame = Path(place) / "frame.html"  # a window cannot be as narrow as a phone
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
            f'style="width:{width}px;height:{height}px;border:0"></iframe>'
        )
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--allow-file-access-from-files",
                f"--user-data-dir={place}/profile",
                f"--window-size={max(width, NARROWEST)},{height}",
                f"--screenshot={place}/whole.png",
                *flags,
                frame.as_uri(),
            ],
            check=True,
            timeout=120,
            stderr=subprocess.DEVNULL,
        )
        shown = Image.open(f"{place}/whole.png").convert("RGB").crop((0, 0, width, height))
        shown.quantize(256, Image.Quantize.MEDIANCUT).save(out, optimize=True)
    print(f"{out}: {width} x {height}, {out.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
