"""Chat: messages to text as a model was trained to read them, and its answers parsed while they stream.

``chat_format(bundle)`` gives the format of a bundle; ``chat_format("v4-0731")`` one by its name. Standard library only, but for Jinja
templates, which need jinja2.
"""

from .events import Arguments, CallEnd, CallStart, Content, Event, Reasoning, joined
from .formats import ChatFormat, chat_format
from .messages import Message, Tool, ToolCall, read_messages, read_tools
from .prompt import Prompt

__all__ = [
    "Arguments", "CallEnd", "CallStart", "ChatFormat", "Content", "Event", "Message", "Prompt", "Reasoning", "Tool", "ToolCall",
    "chat_format", "joined", "read_messages", "read_tools",
]  # fmt: skip
