"""An HTTP server with OpenAI's API, for one model and many clients.

    npllama serve -m MODEL        # with starlette and uvicorn: pip install 'npllama[serve]'

| file | what it does |
|---|---|
| worker.py | the thread that computes: requests join, are decoded together, and leave |
| requests.py | OpenAI's JSON to checked requests; what is not supported is refused by name |
| replies.py | completions to OpenAI's JSON |
| app.py | the routes, on Starlette: limits, keys, errors, server-sent events |

Each request gets the tokens it would get alone, ties within rounding aside.
"""
