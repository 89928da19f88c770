"""An HTTP server with OpenAI's API, for one model and many clients.

    npllama serve -m MODEL        # with starlette and uvicorn: pip install 'npllama[serve]'

| file | what it does |
|---|---|
| worker.py | the thread that computes: continuous batching, so requests join and leave a running batch |
| requests.py | checks OpenAI's JSON; unsupported parameters are refused by name |
| replies.py | the parts of OpenAI's replies: ids, token counts, log-probabilities |
| choices.py | writes choices as JSON, whole or piece by piece |
| app.py | the routes, on Starlette: limits, API key, errors, server-sent events |
| server.py | uvicorn's server, with an end to running requests at shutdown |

Each request gets the tokens it would get alone, except where tokens tie within rounding.
"""
