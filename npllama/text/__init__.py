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

| file | what it does |
|---|---|
| completion.py | complete(), where a text ends, and what is known of each token |
| batching.py | several texts decoded together, each of which joins and leaves by itself |
"""
