"""A batch script for Slurm (`sbatch FILE`)."""

import shlex

from slipstream.launch.job import GRACE_SECONDS, PORT, Job, environment, torchrun


def slurm(job: Job) -> str:
    """One torchrun a node under `srun`. Before its time is up, and when it is preempted, the job saves and goes back
    into the queue; it does so as long as each turn has brought a new checkpoint."""
    own = {option.partition("=")[0] for option in job.options}
    settings = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(job.gpus),
        "exclusive": "",
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
        "requeue": "",
        # To the ranks rather than to this script; torchrun hands it on.
        "signal": f"USR1@{GRACE_SECONDS}",
    }
    lines = [f"{key}={value}" if value else key for key, value in settings.items() if key not in own]
    pointer = shlex.quote(job.checkpoint_pointer)
    steps = torchrun(
        job,
        nodes='"$SLURM_NNODES"',
        gpus=str(job.gpus),
        head='"$head:$port"',
        run_id='"$SLURM_JOB_ID"',
        before='srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 ',
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{line}" for line in (*lines, *job.options)),
            "set -uo pipefail",
            *job.setup,
            "",
            *environment(),
            "",
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"port=$(({PORT} + SLURM_JOB_ID % 1000))",
            f"pointer={pointer}",
            'before=$(cat "$pointer" 2> /dev/null)',
            "",
            *steps,
            "status=$?",
            "",
            "# The pointer is there while the run is not over. A turn without a new checkpoint would fail again.",
            'after=$(cat "$pointer" 2> /dev/null)',
            'if [ "$status" -ne 0 ] && [ -n "$after" ] && [ "$after" != "$before" ]; then',
            '  echo "stopped after $after: back into the queue"',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        ]
    )
