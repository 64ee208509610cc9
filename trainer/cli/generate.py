"""Complete prompts with a model: a JSON line for each, with its completion.

    onecurve generate runs/sft/export prompts.jsonl > completions.jsonl
    onecurve generate runs/sft/export --prompt "Who paints?" --temperature 0
    onecurve generate runs/pretrain/export --prompt "Once upon a time" --template raw

Rows of a file are of any form of prompts: prompt, messages, ShareGPT, Alpaca. The folder's own chat template renders them;
--template raw continues the text as it stands, for models that have no template. What is drawn depends on the seed and the
prompt's number alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from trainer.cli.parsing import add_sampling_arguments, add_template_arguments, parser_of, template_options
from trainer.data.messages import Chat, as_messages
from trainer.data.prompts import PROMPT_FORMATS
from trainer.data.row_formats import read_rows
from trainer.data.sources import DataSource
from trainer.generation.pretrained import ChatModel
from trainer.generation.sampling import Sampling


def main(arguments: Sequence[str]) -> int:
    """Print the completions, as they are done."""
    parser = parser_of("generate", __doc__)
    parser.add_argument("model", type=Path, help="an export, or any Hugging Face folder (or hub id) of these families")
    parser.add_argument("prompts", nargs="?", help="a file of prompts, as GRPO reads them")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    add_template_arguments(parser)
    parser.add_argument("--batch", type=int, default=64, help="prompts that are completed at once")
    add_sampling_arguments(parser, temperature=1.0, tokens=256)
    a = parser.parse_args(arguments)
    if (a.prompts is None) == (not a.prompt):
        parser.error("give either a file of prompts, or --prompt TEXT")
    asked = [({"prompt": text}, Chat(as_messages(text, "--prompt", "user"), 1)) for text in a.prompt]
    if a.prompts is not None:
        rows = read_rows(DataSource(a.prompts), PROMPT_FORMATS, "prompt", mixed=True)
        asked = [(dict(row), chat) for _, chat, row in rows]
    model = ChatModel.open(a.model, a.template, **template_options(a))
    sampling = Sampling(a.tokens, a.temperature)
    numbered = iter(enumerate(asked))
    while group := list(islice(numbered, a.batch)):
        keys = [(a.seed, number) for number, _ in group]
        texts = model.complete([chat for _, (_, chat) in group], sampling, keys)
        for (_, (row, _)), text in zip(group, texts, strict=True):
            print(json.dumps({**row, "completion": text}, ensure_ascii=False), flush=True)
    return 0
