"""From messages to the text that a model was trained to answer. Knows no model."""

from keras_mamba2.chat.template import ChatTemplate as ChatTemplate
from keras_mamba2.chat.tools import tool_schema as tool_schema
