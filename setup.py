"""What setup.cfg cannot say: the scripts of slurm/ are installed as asgd_mpi/slurm, from where slurm_scripts writes them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["asgd_mpi*", "data_prep*"]), "asgd_mpi.slurm"],
    package_dir={"asgd_mpi.slurm": "slurm"},
)
