"""Text in, text out.

>>> import npllama
>>> model = npllama.load()
>>> done = npllama.complete(model, "ROMEO:\\nIs the day so young", max_tokens=8, stop="\\n", logprobs=1)
>>> done.text, done.finish_reason
(' Romeo?', 'stop')
>>> [(entry.piece, round(entry.logprob, 2)) for entry in done.logprobs]
[(' Romeo', -1.72), ('?', -0.51), ('\\\\n\\\\n', -0.47)]

Several prompts are computed together, and a stream's pieces never break a character:

>>> [done.text for done in npllama.complete(model, ["To be or", "Once more"], max_tokens=4)]
['apeed.', ':\\nI have']
>>> list(npllama.complete(model, "To be", max_tokens=4, temperature=0.8, seed=1, stream=True))
[' t', 'aunt', ':', '\\n']

A conversation keeps its messages, and the cache of what was computed:

>>> chat = npllama.Conversation(model, "Be brief.", sampling=npllama.Sampling(), max_tokens=4)
>>> answer = chat.say("Who art thou?")
>>> chat.last.finish_reason, [message["role"] for message in chat.messages]
('length', ['system', 'user', 'assistant'])
>>> "".join(chat.stream("And I?")) == chat.messages[-1]["content"]
True

| file | what it does |
|---|---|
| completion.py | complete(): stop conditions, log-probabilities, streams |
| conversation.py | a chat, whose cache is kept between turns; saved and loaded as JSON |
| batching.py | continuous batching: texts are decoded together, and each joins and leaves independently |
"""

from .batching import Batch
from .completion import Completion, Continuation, Stream, TokenLogprobs, complete
from .conversation import Conversation, ConversationError

__all__ = [
    "Batch",
    "Completion",
    "Continuation",
    "Conversation",
    "ConversationError",
    "Stream",
    "TokenLogprobs",
    "complete",
]
