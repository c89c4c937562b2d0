"""The report: its numbers against sums over the raw lines, runs that are damaged or unfinished, and the audit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgd_mpi import report
from asgd_mpi.record.audit import audit
from asgd_mpi.record.events import (
    Checkpoint,
    Cut,
    End,
    EventLog,
    Interval,
    Note,
    Push,
    Start,
    Validation,
)
from asgd_mpi.record.rundir import RunDir
from asgd_mpi.record.summary import Summary, summarize
from asgd_mpi.report import markdown
from asgd_mpi.report.brief import brief
from asgd_mpi.report.page import page

T0 = 1000.0
BATCH = 10
NUM_WORKERS = 3
EPOCH = 120  # samples
PUSHES = 60  # 5 epochs; worker 2 sends every 12th push


def make_pushes(count=PUSHES):
    """A legal order: each worker reads the newest version as soon as its own push is applied."""
    pushes, held = [], [0] * NUM_WORKERS
    for version in range(count):
        worker = 2 if version % 12 == 11 else version % 2
        start = version * BATCH % EPOCH
        pushes.append(
            Push(
                T0 + 1 + version / 10,
                version,
                worker,
                held[worker],
                version * BATCH // EPOCH,
                start,
                start + BATCH,
                lr=0.1 / (1 + version),
                loss=2.0 - version / 100,
                skipped=int(version == 7),
            )
        )
        held[worker] = version + 1
    return pushes


def write_log(path, items):
    log = EventLog(path)
    for item in items:
        log.write(item)
    log.close()


def make_run(path, pushes, model="digits_cnn", validations=5, num_workers=NUM_WORKERS):
    """A finished run, written with the run's own encoders."""
    run = RunDir.create(path, "test")
    # JSON is YAML
    run.config.write_text(json.dumps({"model": {"name": model}, "run": {"epochs": 5, "seed": 3}}))
    run.versions.write_text(
        json.dumps({"packages": {"torch": "2.9", "mpi4py": "4.1"}, "mpi": "Open MPI 5.0.5"})
    )
    write_log(run.pushes, pushes)
    for rank in range(num_workers + 1):
        own = [push for push in pushes if push.worker == rank - 1]
        role = "worker" if rank else "server"
        log = [
            Start(
                T0 + 0.1 * rank,
                rank,
                role,
                f"node{rank // 2}",
                "cuda:0" if rank else "cpu",
                num_workers,
                1000,
                EPOCH,
                5 * EPOCH,
            )
        ]
        for i in range(len(own)):
            log.append(
                Interval(
                    T0 + i,
                    T0 + i + 1,
                    data=0.25,
                    compute=0.5,
                    push=0.125,
                    idle=0.125,
                    images=BATCH,
                    pushes=1,
                    fetches=2,
                    torn_reads=rank,
                    bytes_pushed=4000,
                    bytes_fetched=8000,
                )
            )
        if rank == 0:
            log += [
                Interval(T0, T0 + 8, apply=6, idle=2, images=10 * len(pushes), pushes=len(pushes))
            ]
            log += [
                Validation(
                    T0 + 2 + i / 10, i * 12, i * EPOCH, float(i), 50, 0.9 - i / 1000, 0.5, 2.0
                )
                for i in range(1, validations + 1)
            ]
            log += [
                Checkpoint(T0 + 7, 60, "checkpoints/v000000060", 0.5, 8000),
                Note(T0 + 1, "two ranks share a GPU"),
            ]
        write_log(run.metrics_of(rank), [*log, End(T0 + 8, "finished")])
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", make_pushes())


def raw(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def cells(markdown, first):
    """The rows of the table(s) whose first cell is `first`."""
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
    ]
    return [row for row in rows if row and row[0] == first]


def test_time_hidden_behind_the_computation_is_reported_apart_from_the_phases(run):
    assert "Overlap:" not in report.render(summarize(run))
    write_log(
        run.metrics_of(1),
        [
            Interval(T0 + 50, T0 + 51, compute=1.0, hidden=0.75),
            Interval(T0 + 51, T0 + 52, hidden=0.5),
        ],
    )
    assert (
        "fetched for another 1.2 s in all behind the computation" in report.render(summarize(run))
        and summarize(run).ranks[1].hidden == 1.25
    )


def test_the_overlap_is_the_hidden_share_of_push_and_fetch(run):
    assert summarize(run).overlap == 0.0
    write_log(run.metrics_of(1), [Interval(T0 + 50, T0 + 51, compute=1.0, hidden=2.5)])
    summary = summarize(run)
    # every push of a worker waits 0.125 s
    assert summary.overlap == pytest.approx(2.5 / (2.5 + 0.125 * PUSHES))
    assert "behind the computation, 25.0 % of the time that it took" in report.render(summary)
    for rank in range(1, 4):
        run.metrics_of(rank).unlink()
    assert summarize(run).overlap is None


def test_the_numbers_are_the_sums_over_the_raw_lines(run):
    summary = summarize(run)
    # [t, version, worker, read_version, epoch, start, stop, lr, loss, skipped]
    pushes = raw(run.pushes)
    starts = [raw(run.metrics_of(rank))[0]["t"] for rank in range(4)]
    images = [sum(p[6] - p[5] - p[9] for p in pushes if p[2] == worker) for worker in range(3)]
    training_s = pushes[-1][0] - min(starts)
    assert summary.images == sum(images) == 599
    assert summary.training_s == pytest.approx(training_s)
    assert summary.images_per_s == pytest.approx(sum(images) / training_s)
    assert [worker.images for worker in summary.workers] == images
    assert [worker.share for worker in summary.workers] == pytest.approx(
        [n / sum(images) for n in images]
    )
    assert summary.staleness.mean == pytest.approx(sum(p[1] - p[3] for p in pushes) / len(pushes))
    assert summary.staleness.max == max(p[1] - p[3] for p in pushes)
    assert sum(bin.pushes for bin in summary.staleness.histogram) == len(pushes)
    losses = [(p[8], p[6] - p[5] - p[9]) for p in pushes if p[4] == 0]
    assert summary.epochs[0].mean_loss == pytest.approx(
        sum(a * b for a, b in losses) / sum(b for _, b in losses)
    )
    intervals = [
        line
        for rank in (1, 2, 3)
        for line in raw(run.metrics_of(rank))
        if line["event"] == "interval"
    ]
    assert summary.bytes_fetched == sum(line["bytes_fetched"] for line in intervals)
    assert summary.torn_reads == sum(line["torn_reads"] for line in intervals)
    assert summary.epochs_done == pytest.approx(5.0)
    assert (summary.lr_first, summary.lr_last) == (pushes[0][7], pushes[-1][7])


def test_the_bubble_of_stages_is_the_sum_over_the_raw_lines(tmp_path):
    """2 workers of 2 stages: ranks 1 and 2 lead, 3 and 4 are their second stages."""
    run = make_run(tmp_path / "run", make_pushes(), num_workers=2)
    begun = Cut(T0, 2, 4, "gpipe", 0.2, ["conv1", "layer3"])
    write_log(run.metrics_of(0), [begun])
    for rank, passes, pipelined in ((1, 3.0, 5.0), (2, 2.0, 4.5), (3, 4.0, 0.0), (4, 3.5, 0.0)):
        start = [Start(T0, rank, "stage", f"node{rank % 2}", "cuda:0", 2, 1000)] if rank > 2 else []
        halves = [
            Interval(
                T0 + i,
                T0 + i + 10,
                compute=passes / 2,
                passes=passes / 2,
                validate=0.5,
                pipelined=pipelined / 2,
            )
            for i in (0, 10)
        ]
        write_log(run.metrics_of(rank), [*start, *halves])
    lines = {
        rank: [line for line in raw(run.metrics_of(rank)) if line["event"] == "interval"]
        for rank in (1, 2, 3, 4)
    }
    total = {
        rank: {
            name: sum(line.get(name, 0.0) for line in lines[rank])
            for name in ("passes", "pipelined", "validate")
        }
        for rank in lines
    }
    found = summarize(run).pipelines
    whole = 2 * (total[1]["pipelined"] + total[2]["pipelined"])
    passes = sum(each["passes"] for each in total.values())
    assert found.measured == pytest.approx(1 - passes / whole) and (passes, whole) == (12.5, 19.0)
    assert (found.num_stages, found.num_parts, found.schedule, found.expected) == (
        2,
        4,
        "gpipe",
        0.2,
    )
    assert [(use.rank, use.worker, use.stage) for use in found.stages] == [
        (1, 0, 0),
        (2, 1, 0),
        (3, 0, 1),
        (4, 1, 1),
    ]
    for use in found.stages:
        lead = total[use.worker + 1]
        assert use.waits == pytest.approx(lead["pipelined"] - total[use.rank]["passes"])
        assert use.passes + use.waits + use.validate + use.rest == pytest.approx(use.seconds)
        assert use.seconds == pytest.approx(
            sum(line["t1"] - line["t0"] for line in lines[use.rank])
        )
    markdown, html = report.render(summarize(run)), page(summarize(run))
    assert [
        "4",
        "1",
        "1",
        "cuda:0",
        "node0",
        "3.5 (18 %)",
        "1.0 (5 %)",
        "1.0 (5 %)",
        "14.5 (72 %)",
    ] in cells(markdown, "4")
    for text in (markdown, html):
        assert "wait for each other 34.2 % of the time; the plan expected 20.0 %" in text
    assert (
        "wait for each other 34 % of the time that a batch takes (the plan expected 20 %). Cut a batch into more parts than 4"
        in markdown
    )
    assert "The columns of a replica wait for each other 34 %" in report.render(
        msgspec.structs.replace(
            summarize(run), pipelines=msgspec.structs.replace(found, schedule="columns")
        )
    )
    assert (
        msgspec.json.decode(msgspec.json.encode(summarize(run)))["pipelines"]["measured"]
        == found.measured
    )
    assert summarize(make_run(tmp_path / "other", make_pushes())).pipelines is None


def test_a_finished_run_has_no_problems_and_names_its_straggler(run):
    summary = summarize(run)
    assert (summary.status, summary.problems, summary.audit.violations) == ("finished", [], [])
    assert [worker.rank for worker in summary.stragglers] == [3]
    assert (
        "**Stragglers**, below half of the median images/s while they train: rank 3 (cuda:0 on node1)."
        in report.render(summary)
    )


def test_the_phases_are_shown_as_seconds_and_as_percent_of_the_covered_time(run):
    rows = cells(report.render(summarize(run)), "0")
    assert ["0", "server", "8.0"] + ["0.0 (0 %)"] * 5 + [
        "6.0 (75 %)",
        "0.0 (0 %)",
        "0.0 (0 %)",
        "2.0 (25 %)",
    ] in rows


def test_phases_that_do_not_add_up_are_reported(run):
    write_log(run.metrics_of(1), [Interval(T0, T0 + 100, compute=10)])
    assert (
        "rank 1: its phases add up to 40.0 s, its intervals to 130.0 s." in summarize(run).problems
    )


def test_the_command_prints_a_short_form_that_says_where_the_whole_is(run, capsys):
    assert report.main([str(run.path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 25 and max(map(len, shown[:-3])) <= 100  # the last are paths
    assert [line.split()[1] for line in shown[-3:]] == [
        f"{run.report}/report.{kind}" for kind in ("html", "md", "json")
    ]
    text = " ".join(" ".join(shown).split())
    assert f"Is it fast? {summarize(run).images_per_s:,.0f} images/s. By 3 workers" in text
    assert "Is it right? 10.50 % accuracy." in text and "each applied once" in text
    assert "What to change? " in text


@pytest.mark.parametrize(
    ("source", "is_named"), [("shards", True), ("task", False), ("script", False)]
)
def test_a_data_set_that_was_not_used_is_not_named(run, source, is_named):
    config = json.loads(run.config.read_text())
    run.config.write_text(json.dumps({**config, "data": {"path": "digits", "source": source}}))
    summary = summarize(run)
    assert (summary.config.get("data.path") == "digits") == is_named
    assert (" on digits" in brief(summary)) == is_named
    assert ("| data.path | digits |" in markdown.render(summary)) == is_named


def test_a_run_with_much_to_say_is_short_all_the_same(run, capsys):
    for rank in range(4):
        run.metrics_of(rank).write_bytes(b"\x00\n" * 3)
    run.config.write_text("model: {name: " + "x" * 5000 + "}")
    assert report.main([str(run.path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 25 and "and more in the report" in shown[21]


def test_the_command_prints_and_writes_markdown_and_json_that_agree(run, capsys):
    assert report.main([str(run.path), "--full"]) == 0
    markdown = capsys.readouterr().out
    assert (run.report / "report.md").read_text() == markdown
    summary = msgspec.json.decode((run.report / "report.json").read_bytes(), type=Summary)
    assert summary == summarize(run)
    assert report.render(summary) == markdown
    assert cells(markdown, "images/s")[0][1].startswith(f"{summary.images_per_s:,.1f} in total")
    assert cells(markdown, "pushed")[0][1:] == [
        "240 kB",
        f"{summary.bytes_pushed_per_s / 1000:.4g} kB",
    ]
    assert "1 written, 0 of them still there" in markdown and "two ranks share a GPU" in markdown


def test_the_cores_of_the_hosts_are_those_that_the_ranks_wrote_down(run):
    assert summarize(run).cores == {}
    ranks = [{"rank": rank, "host": f"n{rank // 2}", "host_cores": 8} for rank in range(4)]
    run.versions.write_text(json.dumps({"ranks": [*ranks, "odd", {"host": 3, "host_cores": "x"}]}))
    assert summarize(run).cores == {"n0": 8, "n1": 8}
    run.versions.write_text(json.dumps({"ranks": "odd"}))
    assert summarize(run).cores == {}


def test_no_write_leaves_the_run_directory_as_it_is(run, capsys):
    assert report.main([str(run.path), "--no-write", "--full"]) == 0
    assert capsys.readouterr().out.startswith("# Run run: finished\n")
    assert report.main([str(run.path), "--no-write"]) == 0
    shown = capsys.readouterr().out
    assert list(run.report.iterdir()) == []
    assert shown.startswith("run: finished; digits_cnn") and "report.html" not in shown


def test_a_directory_that_is_no_run_is_an_error_with_status_2(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_killed_run_is_reported_with_what_it_has(run):
    cut(run.pushes, 9)
    for rank in range(4):
        cut(run.metrics_of(rank), 9)  # into the End event
    summary = summarize(run)
    assert (summary.status, summary.reason) == ("unfinished", "killed or still running")
    assert summary.audit.num_pushes == PUSHES - 1 and summary.audit.violations == []
    assert summary.unreadable_lines == {
        "pushes.log": 1,
        **{f"metrics/rank00{rank}.jsonl": 1 for rank in range(4)},
    }
    head = report.render(summary).split("| workers |")[0]
    assert (
        "no End event from rank 0, 1, 2, 3" in head
        and "pushes.log: 1 unreadable line left out" in head
    )


def without_the_servers_end(run):
    path = run.metrics_of(0)
    path.write_bytes(
        b"".join(line for line in path.read_bytes().splitlines(True) if b'"end"' not in line)
    )


def test_a_worker_that_failed_does_not_fail_a_run_that_the_server_finished(run):
    write_log(run.metrics_of(1), [End(T0 + 9, "failed", "it was retired")])
    assert summarize(run).status == "finished"


def test_the_earliest_failure_is_the_reason(run):
    without_the_servers_end(run)
    for rank, t in ((1, 9.0), (2, 8.5)):
        write_log(run.metrics_of(rank), [End(T0 + t, "failed", f"reason of rank {rank}")])
    summary = summarize(run)
    assert (summary.status, summary.reason) == ("failed", "rank 2: reason of rank 2")


def test_an_error_file_makes_a_run_failed_although_no_event_says_so(run):
    without_the_servers_end(run)
    run.error_of(2).write_text("Traceback")
    assert summarize(run).reason == "see error.rank002.txt"


def test_a_missing_rank_is_named_and_keeps_its_applied_images(run):
    run.metrics_of(2).unlink()
    summary = summarize(run)
    assert "metrics are missing for 1 of 4 ranks: 2." in summary.problems
    assert summary.workers[1].host == "unknown" and summary.workers[1].images > 0


def test_damaged_lines_are_counted_for_each_file(run):
    for path, garbage in (
        (run.metrics_of(1), b'{"event":"start"}\n\x00\x01\n'),
        (run.pushes, b"[1,2]\n"),
    ):
        path.write_bytes(path.read_bytes() + garbage)
    assert summarize(run).unreadable_lines == {"metrics/rank001.jsonl": 2, "pushes.log": 1}


def test_a_line_that_is_not_utf8_does_not_stop_the_report(run):
    run.metrics_of(1).write_bytes(
        run.metrics_of(1).read_bytes() + b'{"event":"note","t":1,"text":"\xff"}\n'
    )
    summary = summarize(run)
    assert summary.workers[0].images == 300
    assert any(problem.startswith("metrics/rank001.jsonl") for problem in summary.problems)


def test_without_pushes_the_images_are_those_of_the_metrics(run):
    run.pushes.unlink()
    summary = summarize(run)
    assert summary.images == 600 and summary.staleness is None
    assert any(problem.startswith("pushes.log cannot be read") for problem in summary.problems)
    assert "No applied pushes to check." in report.render(summary)


def test_a_run_directory_with_nothing_but_damaged_files_is_still_reported(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: [")
    (tmp_path / "versions.json").write_text("[1]")
    (tmp_path / "pushes.log").write_bytes(b"\x00\n")
    assert report.main([str(tmp_path), "--full"]) == 0
    printed = capsys.readouterr().out
    for name in ("config.yaml", "versions.json", "pushes.log", "metrics/"):
        assert name in printed


def test_long_tables_are_thinned_and_say_so(tmp_path):
    markdown = report.render(summarize(make_run(tmp_path / "run", make_pushes(), validations=50)))
    assert "30 of 50 rows left out" in markdown
    table = markdown.split("## Validations")[1].split("## Epochs")[0]
    versions = re.findall(r"^\| [\d.]+ s \| [\d.]+ \| [\d]+ \| (\d+) ", table, re.M)
    assert (len(versions), versions[0], versions[-1]) == (20, "12", "600")


def test_a_name_full_of_markup_stays_in_its_cell(tmp_path):
    run = make_run(tmp_path / "run", make_pushes(), model="a|b `c` *d*\n| e | [f](g) <h>")
    (row,) = cells(report.render(summarize(run)), "model.name")
    assert row == ["model.name", r"a\|b \`c\` \*d\* \| e \| \[f\](g) \<h\>"]


def test_the_report_imports_neither_torch_nor_mpi_nor_numpy():
    code = "import sys, asgd_mpi.report; print(sorted({'torch', 'mpi4py', 'numpy', 'h5py'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
        ).stdout
        == "[]\n"
    )


def test_the_ages_of_a_legal_run_add_up_to_workers_times_versions():
    pushes = make_pushes()
    found = audit(pushes)
    last = {push.worker: push.version for push in pushes}
    assert found.age_applied == sum(push.staleness + 1 for push in pushes)
    assert found.age_between == 0  # every worker reads at once
    assert found.age_at_end == sum(PUSHES - 1 - version for version in last.values())
    assert found.age_applied + found.age_between + found.age_at_end == NUM_WORKERS * PUSHES


def test_a_late_read_counts_as_age_in_flight():
    pushes = make_pushes()
    late = next(i for i, push in enumerate(pushes) if push.worker == 1 and push.staleness)
    pushes[late] = msgspec.structs.replace(pushes[late], read_version=pushes[late].version)
    found = audit(pushes)
    assert found.age_between == make_pushes()[late].staleness and found.violations == []
    assert found.age_applied + found.age_between + found.age_at_end == NUM_WORKERS * PUSHES


def test_a_worker_that_never_pushed_holds_the_first_version_all_the_time():
    assert (
        audit(make_pushes(), num_workers=4).age_at_end - audit(make_pushes()).age_at_end == PUSHES
    )


def test_the_straggler_of_the_paper_gives_the_published_staleness():
    """Step times 1, 1, 1, 10 and 310 pushes: ages sum to 1240, the slow one's staleness is always 30."""
    held, pushes = [0] * 4, []
    for second in range(1, 11 * 10):
        for worker in range(4):
            if len(pushes) < 310 and (worker < 3 or second % 10 == 0):
                t = len(pushes)
                pushes.append(Push(float(second), t, worker, held[worker], 0, t, t + 1, 0.1, 1.0))
                held[worker] = t + 1
    found = audit(pushes)
    assert (
        found.age_applied + found.age_between + found.age_at_end == 1240 and found.violations == []
    )
    assert {push.staleness for push in pushes if push.worker == 3} == {30}
    assert sum(push.staleness for push in pushes) / 310 == pytest.approx(2.9806, abs=1e-4)


def test_the_audit_finds_a_repeated_and_a_missing_sample():
    pushes = make_pushes()
    pushes[5] = msgspec.structs.replace(pushes[5], start=49, stop=59)  # was [50, 60)
    found = audit(pushes)
    assert (found.epochs[0].covered, found.epochs[0].repeated, found.epochs[0].missing) == (
        119,
        1,
        1,
    )
    assert found.violations == ["epoch 0: 1 samples repeated"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1))
def test_the_audit_counts_samples_as_a_plain_count_does(batches):
    pushes = [
        Push(T0, t, 0, t, 0, start, start + size, 0.1, 1.0)
        for t, (start, size) in enumerate(batches)
    ]
    uses = [position for start, size in batches for position in range(start, start + size)]
    (epoch,) = audit(pushes).epochs
    assert (epoch.covered, epoch.repeated) == (len(set(uses)), len(uses) - len(set(uses)))
    assert epoch.missing == len(set(range(max(uses, default=-1) + 1)) - set(uses))


def test_a_push_over_the_end_of_an_epoch_counts_its_images_in_both(tmp_path):
    """Seen: a run that was ended there had no line for the second epoch, and no report."""
    push = Push(T0 + 1, 0, 0, 0, 0, 110, 120, lr=0.1, loss=2.0, skipped=12, more=[(1, 0, 20)])
    summary = summarize(make_run(tmp_path / "run", [push]))
    first, second = summary.epochs
    assert (first.pushes, first.images, first.mean_loss) == (1, 0, None)
    assert (second.pushes, second.images, second.mean_loss) == (0, 18, 2.0)
    assert cells(report.render(summary), "1")[-1] == ["1", "0", "18", "2.0000", "20", "0", "100"]


def test_the_audit_counts_missing_samples_up_to_the_length_of_the_epoch():
    assert [
        epoch.missing for epoch in audit(make_pushes(), num_samples=125, total_samples=1000).epochs
    ] == [5] * 5


def test_the_audit_finds_a_version_applied_twice_and_a_version_missing():
    pushes = make_pushes()
    twice = audit([*pushes[:10], pushes[9], *pushes[10:]])
    assert twice.versions_repeated == 1
    assert any(
        "the same or a later version came before (the latest at version 9)" in text
        for text in twice.violations
    )
    assert audit(pushes[:20] + pushes[21:]).violations == ["1 of the versions 0 to 59 missing"]


def test_the_audit_finds_pushes_out_of_order():
    pushes = make_pushes()
    pushes[20], pushes[21] = pushes[21], pushes[20]
    assert "1 push out of order" in audit(pushes).violations[0]


def test_the_audit_finds_a_negative_staleness_and_a_read_behind_the_own_push():
    pushes = make_pushes()
    future = audit(
        [*pushes[:30], msgspec.structs.replace(pushes[30], read_version=31), *pushes[31:]]
    )
    assert any("negative staleness" in text for text in future.violations)
    behind = audit(
        [*pushes[:30], msgspec.structs.replace(pushes[30], read_version=2), *pushes[31:]]
    )
    assert any("older than the worker's own previous push" in text for text in behind.violations)
