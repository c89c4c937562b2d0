"""What `mpirun` must be told to start on a laptop, in a container or in CI; on a cluster the scheduler says what may run where."""

from __future__ import annotations


def settings(is_root: bool) -> dict[str, str]:
    """Return environment variables for the launcher; MPICH reads none of them and needs none."""
    variables = {
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # more ranks than cores
        # silences a component that is not used here
        "OMPI_MCA_osc": "^ucx",
    }
    if is_root:
        variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return variables
