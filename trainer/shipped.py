"""Choices that come with the framework."""

from __future__ import annotations

from trainer.data.chats import ChatData
from trainer.data.labelled import LabelledData
from trainer.data.preferences import PreferenceData
from trainer.data.prompts import PromptData
from trainer.models.adapter import Full
from trainer.models.lora import LoRA
from trainer.models.qlora import QLoRA
from trainer.parallel.ddp import DDP
from trainer.parallel.fsdp import FSDP
from trainer.parallel.zero import Zero1, Zero2, Zero3
from trainer.pipelines.dpo import DPO
from trainer.pipelines.kto import KTO
from trainer.pipelines.ppo import PPO
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.reward import RewardModelling
from trainer.pipelines.sft import SFT
from trainer.tinyworld.data import TinyWorldData

SHIPPED = (
    Pretrain, SFT, RewardModelling, DPO, KTO, PPO, Full, LoRA, DDP, FSDP, Zero1, Zero2, Zero3, TinyWorldData, ChatData,
    PreferenceData, LabelledData, PromptData, QLoRA,
)  # fmt: skip
"""Naming them here registers them."""
