"""A trained model as a server: an OpenAI-compatible API, and a page that shows the routing (`serve`).

texts.py        what is asked of the engine and what it answers; tokens become text
engine.py       the one thread that owns the device: slots, queue, decoding
requests.py     pydantic models of the requests, errors in OpenAI's form, what is said about the model
completions.py  /v1/completions and /v1/chat/completions: a request becomes texts, their events become an answer
streams.py      JSON objects and server-sent events; a client that has gone frees its slots
app.py          the routes, and who may ask
sockets.py      the socket
server.py       uvicorn on a socket, until a signal
page/           the page at /
"""
