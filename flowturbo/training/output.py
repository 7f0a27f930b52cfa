"""What a run leaves, where and how often: its options. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from flowturbo.system.options import AT_LEAST_0, AT_LEAST_1, Group, option

FIFTH = 5  # every so many checkpoints one is kept for good


@dataclass(frozen=True)
class OutputOptions(Group):
    """What a run leaves, where and how often, and from where it goes on."""

    results_dir: str = option("results", "each run makes a folder here")
    note: str = option("no-note", "a word for the run's folder name")
    log_every: int = option(100, "steps between figures in log.txt, metrics.jsonl and TensorBoard", within=AT_LEAST_1)
    wandb: bool = option(False, "figures to Weights & Biases too, where wandb is installed; its own settings hold")
    ckpt_every: int = option(
        5000, "steps between checkpoints, and between figures that take a while", within=AT_LEAST_1
    )
    keep_last: int = option(3, "keep the newest K checkpoints; 0 for all", metavar="K", within=AT_LEAST_0)
    keep_every: int | None = option(
        None,
        "keep also those of every M-th step; 0 for none (default: every fifth checkpoint)",
        metavar="M",
        within=AT_LEAST_0,
    )
    sample_every: int = option(
        10_000, "steps between sample grids, the first with the first checkpoint; 0 for none", within=AT_LEAST_0
    )
    resume: str | None = option(
        None,
        "continue from this checkpoint or run; 'auto' takes the newest whole one of this target and note, if any",
        metavar="FILE",
    )
    allow_changes: bool = option(False, "resume although settings or data have changed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "/" in self.note or self.note.startswith("."):
            raise ValueError(f"note {self.note!r} must be a word for a folder name")

    @property
    def kept_steps(self) -> int:
        """Checkpoints of multiples of it are kept besides the newest; 0 for none."""
        return FIFTH * self.ckpt_every if self.keep_every is None else self.keep_every

    def samples_at(self, step: int) -> bool:
        """Whether a grid is due at a step: at its turn, and at the first checkpoint."""
        return self.sample_every > 0 and (step % self.sample_every == 0 or step == self.ckpt_every)
