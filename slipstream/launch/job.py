"""What is started on every node, whatever starts it there: torchrun with elastic restarts."""

import shlex
from dataclasses import dataclass, field

# Ranks finish the step under way and save on these (train/resume.py); torchrun hands on what it is told to.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
GRACE_SECONDS = 600  # to save in, before anything is killed
PORT = 29500


@dataclass(frozen=True)
class Job:
    """A run of `slipstream finetune` on several nodes.

    Attributes:
        recipe: the path of the recipe, as the nodes see it.
        overrides: `section.key=value`.
        output_dir: of the recipe; all nodes have to see the same folder.
        gpus: of a node.
        restarts: how often torchrun starts all ranks again after one died.
        setup: shell lines before the run, such as the activation of an environment.
        options: lines for the scheduler, `name=value`.
    """

    name: str
    recipe: str
    output_dir: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 8
    restarts: int = 3
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = field(default=())

    @property
    def checkpoint_pointer(self) -> str:
        """The file that names the newest checkpoint, there exactly while a run is not over."""
        return f"{self.output_dir}/checkpoints/latest"


def environment() -> list[str]:
    """Shell lines that set up torchrun's environment, and `extra`, an option that it may not know yet."""
    return [
        "# Without this, ranks that torchrun 2.13 starts again may wait for ever at old addresses (pytorch#135712).",
        "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "# Time for ranks that are saving; only newer versions of torchrun have the option.",
        "extra=",
        f'case "$(torchrun --help)" in *--shutdown-timeout*) extra="--shutdown-timeout {GRACE_SECONDS}" ;; esac',
    ]


def torchrun(job: Job, nodes: str, gpus: str, head: str, run_id: str, *, before: str = "") -> list[str]:
    """The shell command, a list of lines; arguments but the job's own are shell expressions, quoted already.

    Args:
        before: what comes before `torchrun`.
    """
    arguments = [
        f"--nnodes={nodes}",
        f"--nproc-per-node={gpus}",
        f"--max-restarts={job.restarts}",
        f"--rdzv-backend=c10d --rdzv-endpoint={head} --rdzv-id={run_id}",
        f"--signals-to-handle {SIGNALS} $extra",
        f"-m slipstream.cli finetune {shlex.join([job.recipe, *job.overrides])}",
    ]
    return [f"{before}torchrun \\", *(f"  {line} \\" for line in arguments[:-1]), f"  {arguments[-1]}"]
