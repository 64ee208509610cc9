"""The forms that a chat template takes: reasoning by any name, contents as texts or parts, arguments as values or text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.messages import REASONING
from trainer.data.turns import ANSWER, ASK, CALL, CALLED, TOOL, TOOLS, USER


@dataclass(frozen=True)
class Forms:
    """What a template takes.

    ``parts``: contents as lists of parts, not as texts.
    ``text_arguments``: the arguments of calls as JSON text, not as values.
    ``developer``: the role ``developer``; others have it as ``system``.
    """

    parts: bool = False
    text_arguments: bool = False
    developer: bool = False

    @classmethod
    def taken_by(cls, probe: Callable[..., str | None]) -> Forms:
        """The forms in which nothing is lost; texts and values where there is a choice."""

        def writes(messages: Sequence[Mapping[str, Any]], forms: Forms, standing: str) -> bool:
            return standing in (probe(forms.apply(messages), tools=TOOLS if standing == CALL else None) or "")

        answer = {"role": "assistant", "content": ANSWER}
        parts = not writes([USER], Forms(), ASK) and writes([USER], Forms(parts=True), ASK)
        calls: list[Mapping[str, Any]] = [USER, CALLED, TOOL, answer]
        text = not writes(calls, Forms(parts), CALL) and writes(calls, Forms(parts, text_arguments=True), CALL)
        developer = writes([{"role": "developer", "content": ANSWER}, USER], cls(parts, developer=True), ANSWER)
        return cls(parts, text, developer)

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages in these forms."""
        return [self._message(message) for message in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        changed = dict(message)
        reasoning = next((message[key] for key in REASONING if message.get(key)), None)
        if reasoning is not None:
            changed = {"thinking": reasoning, **changed, "reasoning_content": reasoning}
        if message["role"] == "developer" and not self.developer:
            changed["role"] = "system"
        if self.parts and isinstance(message.get("content"), str):
            changed["content"] = [{"type": "text", "text": message["content"]}] if message["content"] else []
        if message.get("tool_calls"):
            changed["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return changed

    def _call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not self.text_arguments or not isinstance(function, Mapping) or isinstance(function.get("arguments"), str):
            return call
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}
