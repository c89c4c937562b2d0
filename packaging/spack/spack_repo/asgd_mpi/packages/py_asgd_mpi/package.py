"""asgd_mpi with the site's MPI: spack repo add packaging/spack/spack_repo/asgd_mpi; then, from the root of a clone,
spack dev-build py-asgd-mpi@main.

Written by reading (Spack 1.0's form of repositories and packages), not tried: no Spack was at hand where this is developed.
py-simplejpeg is in no repository of Spack that was found; without it Pillow decodes, more slowly. py-jsonargparse may be older
there than is asked for here: then `spack checksum --add-to-package py-jsonargparse 4.49.0` adds a newer one.
"""

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyAsgdMpi(PythonPackage):
    """Asynchronous SGD on GPU clusters over MPI, for PyTorch."""

    license("Apache-2.0")

    version("main")  # a clone: spack dev-build

    variant("cuda", default=False, description="torch with CUDA")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@68:", type="build")

    # the MPI that mpi4py is built with: openmpi, mpich, or the site's as an external
    depends_on("mpi", type=("build", "link", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-torch@2.4:", type=("build", "run"))
    depends_on("py-torch+cuda", when="+cuda", type=("build", "run"))
    depends_on("py-torch~cuda", when="~cuda", type=("build", "run"))
    depends_on("py-torchvision@0.19:", type=("build", "run"))
    # files of one process each: no parallel HDF5
    depends_on("py-h5py@3.10:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-pillow@10:", type=("build", "run"))
    depends_on("py-scikit-learn@1.3:", type=("build", "run"))
    depends_on("py-scipy@1.11:", type=("build", "run"))
    depends_on("py-jsonargparse@4.49:+signatures", type=("build", "run"))
    depends_on("py-pyyaml@6:", type=("build", "run"))
    depends_on("py-msgspec@0.18:", type=("build", "run"))
    depends_on("py-jinja2@3.1:", type=("build", "run"))
    depends_on("py-matplotlib@3.8:", type=("build", "run"))
    depends_on("py-tqdm@4.66:", type=("build", "run"))
    depends_on("py-xxhash@3.4:", type=("build", "run"))
