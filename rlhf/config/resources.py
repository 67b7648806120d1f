"""The section ``resources``: where it computes, and in how many processes. None of it is in a cache key."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.fields import Count, Section
from rlhf.config.ppo import Ppo
from rlhf.config.supervised import Reward, Sft


class Resources(Section):
    """Where it computes; none of it is in a cache key."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes CUDA where there is one.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Autocast type of the forward passes: auto is bf16 on CUDA and fp32 on a CPU. fp16 needs CUDA.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="CPU threads of torch, of all processes together; 0 takes all cores."
    )
    processes: Count = Field(
        1,
        description="Processes that train in sft, reward and ppo, one GPU each; they share out every batch. "
        "On a CPU, each has its share of the threads.",
    )
    accelerate_config: str | None = Field(
        None, description="A file of `accelerate config` (one machine, DDP) with further options of these processes."
    )
    slot: str = Field(
        "gpu",
        pattern=r"^[A-Za-z0-9._-]{0,64}$",
        description="Stages that compute with models take a slot of this name first, so that runs which share a GPU do "
        "so one after the other. Nothing for no slot.",
    )
    slots: Count = Field(1, description="How many slots of that name there are: GPUs of a machine, say.")

    def conflict(self, sft: Sft, reward: Reward, ppo: Ppo) -> str | None:
        """Why the processes cannot share out the batches, in words; None if they can."""
        processes = self.processes
        for stage, section in (("sft", sft), ("reward", reward)):  # of ppo, it is the episodes that are shared out
            if section.enabled and section.batch_size % processes:
                return (
                    f"{stage}.batch_size {section.batch_size} must be a multiple of resources.processes {processes}, "
                    "which share it out"
                )
        shares = processes * ppo.minibatches
        if processes > 1 and ppo.enabled and ppo.episodes % shares:
            return (
                f"ppo.episodes {ppo.episodes} must be a multiple of resources.processes * ppo.minibatches = "
                f"{processes} * {ppo.minibatches}, which share them out"
            )
        return None
