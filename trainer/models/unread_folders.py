"""Why a folder is not read, and how to get one that is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

DEQUANTIZED = (
    "python -c 'from transformers import AutoModelForCausalLM as M, FineGrainedFP8Config as C; "
    'M.from_pretrained("{0}", quantization_config=C(dequantize=True), dtype="bfloat16")'
    '.save_pretrained("{0}-bf16", save_original_format=False)\' && cp {0}/tokenizer* {0}-bf16/'
)
"""The command that writes a folder of bfloat16 weights beside one of fp8 weights. The original format would be fp8 again."""
PICKLES = ("*.bin", "*.pt", "*.pth")
NEEDS = {
    "kv_lora_rank": "multi-head latent attention", "mamba_d_state": "Mamba layers", "ssm_state_size": "Mamba layers",
    "time_step_rank": "Mamba layers", "conv_L_cache": "short convolutions", "altup_num_inputs": "alternating updates",
    "linear_attn_alpha_factor": "lightning attention", "attention_chunk_size": "attention in chunks",
    "n_positions": "learned positions", "alibi": "ALiBi", "is_encoder_decoder": "an encoder",
}  # fmt: skip
"""Keys of ``config.json`` that only models have which need something that the decoder does not compute."""


def quantized(folder: Path, settings: Any, part: str | None = None) -> str:
    """Of weights that are quantized, by the ``quantization_config`` of their configuration.

    ``part``: what of it is not read, where other settings of the method are.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    remedy = "use the folder of plain weights that it was made from"
    if method == "fp8":
        remedy += f", often without FP8 in its name, or write one: {DEQUANTIZED.format(folder)}"
    layout = f"quant_method={method}, {part}" if part else f"quant_method={method}"
    return f"the weights are quantized ({layout}), a layout that is not read; {remedy}"


def without_safetensors(folder: Path, index: str) -> str:
    """Of weights in other formats, or none."""
    pickles = sorted(f.name for pattern in PICKLES for f in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds {pickles[0]}, a pickle, which may run any program when it is opened, so nothing opens it here; "
            "get safetensors of it: many models of the hub have them in a pull request "
            "(hf download OWNER/NAME --revision refs/pr/N --local-dir DIR), and its space safetensors/convert makes one"
        )
    if any(folder.glob("consolidated*.safetensors")):
        return (
            f"{folder} holds weights in Mistral's own layout; download the model*.safetensors of the same release, too"
        )
    return f"{folder} has neither model.safetensors nor {index}; other formats are not read"


def absent(folder: Path) -> str:
    """Of a folder that does not exist, or holds no model."""
    if folder.is_dir():
        return f"{folder} has no config.json; name a Hugging Face folder, such as the export/ of a run"
    hub = not folder.is_absolute() and len(folder.parts) == 2
    download = f"; for a model of the hub: hf download {folder} --local-dir models/{folder.name}" if hub else ""
    return f"{folder} does not exist{download or '; name a Hugging Face folder, such as the export/ of a run'}"


def unsupported(config: Mapping[str, Any], families: Collection[str]) -> str:
    """Of a ``model_type`` that is none of the ``families``: what it needs, as far as its configuration tells."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    needs = list(dict.fromkeys(word for key, word in NEEDS.items() if config.get(key)))
    if not needs and classes and all(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in classes):
        needs = ["an encoder"]
    listed = f"the {len(families)} that it computes are in docs/families.md"
    if needs:
        return f"model_type={kind} is not supported: it needs {', '.join(needs)}, which the decoder lacks; {listed}"
    rule = "no row of trainer/models/families.py describes it"
    return f"model_type={kind} is not supported: {rule}; add one as docs/extending.md shows; {listed}"
