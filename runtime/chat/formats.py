"""The chat format of a bundle, or one by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ArtifactError, nearest
from ...export.contract.chat import CHAT, DEEPSEEK, REVISIONS, ChatFile
from ..bundle import Bundle
from ..tokenizer import Tokenizer
from .deepseek import write_prompt
from .messages import Message, Tool, read_messages, read_tools, wrong
from .parser import DeepseekParser, Parser, PlainParser, random_id
from .prompt import Prompt
from .revisions import DSML, THINK
from .revisions import REVISIONS as _RULES
from .templates import render

Messages = Iterable[Mapping[str, Any] | Message]
Tools = Iterable[Mapping[str, Any] | Tool]


@dataclass(frozen=True)
class ChatFormat:
    """How a model reads conversations and writes answers.

    Attributes:
        file: what the bundle says of its chat.
        special: the special tokens of the bundle's tokenizer.
    """

    file: ChatFile
    special: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The revision of DeepSeek's encoding, or "jinja"."""
        return self.file.revision or self.file.encoding

    @property
    def efforts(self) -> tuple[str, ...]:
        """The named levels of reasoning effort; none if only the template knows."""
        return tuple(_RULES[self.name].efforts) if self.file.encoding == DEEPSEEK else ()

    def prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        thinking: bool = True,
        effort: str | int | None = None,
        add_generation_prompt: bool = True,
        drop_reasoning: bool = True,
    ) -> Prompt:
        """The prompt of a conversation, as text and token ids.

        Args:
            messages: dictionaries of OpenAI's API, or typed messages.
            tools: what may be called, as OpenAI's API has it. DeepSeek's encoding puts them into the system or developer message
                at the start, or into an empty system message.
            thinking: whether the model thinks before it answers.
            effort: how much it thinks; ``efforts`` has the levels. None is the model's default.
            add_generation_prompt: end with what asks for an answer, if the last message is not an answer.
            drop_reasoning: leave out the reasoning before the last message of a user. DeepSeek's encoding keeps it anyway where
                there are tools; templates decide themselves.

        Raises:
            InputError: a message, a tool or an argument is wrong, or the template refuses the messages.
            ArtifactError: the bundle's template is not valid.
            MissingDependencyError: the format is a template, and jinja2 is not installed.
        """
        for name, value in (
            ("thinking", thinking),
            ("add_generation_prompt", add_generation_prompt),
            ("drop_reasoning", drop_reasoning),
        ):
            if type(value) is not bool:
                raise wrong(name, value, "True or False")
        rows, functions = read_messages(messages), read_tools(tools)
        if self.file.encoding == DEEPSEEK:
            return write_prompt(
                _RULES[self.name], rows, tools=functions, thinking=thinking, effort=effort,
                add_generation_prompt=add_generation_prompt, drop_reasoning=drop_reasoning,
            )  # fmt: skip
        return render(
            self.file.template, self.file.tokens, rows, special=self.special, tools=functions, thinking=thinking, effort=effort,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def encode(self, messages: Messages, **options: Any) -> str:
        """The text of :meth:`prompt`, with the same arguments."""
        return self.prompt(messages, **options).text

    def parser(self, *, thinking: bool = True, new_id: Callable[[], str] = random_id) -> Parser:
        """A parser for one answer. ``thinking``: what the prompt's ``thinks`` says. ``new_id`` makes the ids of calls."""
        if self.file.encoding == DEEPSEEK:
            return DeepseekParser(_RULES[self.name], thinking=thinking, new_id=new_id)
        return PlainParser()


def chat_format(source: Bundle | str) -> ChatFormat:
    """The format of a bundle, or a revision of DeepSeek's encoding by its name, for bundles that do not say which is theirs.

    Raises:
        ArtifactError: the bundle does not say it, or its tokenizer is of another kind than its encoding.
        InputError: there is no revision of this name.
    """
    if isinstance(source, str):
        if source not in REVISIONS:
            raise wrong("the chat format", source, f"one of {', '.join(REVISIONS)}", nearest(source, REVISIONS).strip())
        return ChatFormat(ChatFile(DEEPSEEK, source))
    if source.chat is None:
        raise ArtifactError(
            f"{source.folder} has no {CHAT}: its checkpoint has neither DeepSeek-V4's tokens nor a chat template, or an older foldkv "
            f"made it. Name an encoding (`--chat-format {REVISIONS[0]}`, in Python chat_format({REVISIONS[0]!r})), or make the bundle again."
        )
    file, tokenizer = ChatFile.read(source.chat), Tokenizer.from_bundle(source)
    found = ChatFormat(file, tokenizer.special_tokens)
    if file.encoding == DEEPSEEK:
        for mark in (DSML, THINK):
            if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
                raise ArtifactError(
                    f"{source.folder} has DeepSeek's chat encoding, but its tokenizer does not have {mark} as one token. Put the "
                    "tokenizer.json that belongs to the checkpoint beside it, and make the bundle again."
                )
    return found
