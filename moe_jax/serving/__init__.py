"""A trained model as a server: an OpenAI-compatible API, and a page that shows the routing (`serve`).

texts.py        what is asked of the engine, and what it answers: `TextRequest`, `Piece`, `Event`
pieces.py       tokens become text; a stop string ends it
engine.py       the one thread that owns the device: slots, queue, decoding
limits.py       the bounds of every request, and `ApiError`
fields.py       the fields of a request, read and checked
completions.py  /v1/completions: a body becomes requests, events become an answer
chat.py         /v1/chat/completions, for tuned runs
answers.py      what both have in common
model_card.py   what is said about the model
streams.py      JSON objects and server-sent events; a client that has gone frees its slots
access.py       who may ask: Host, Origin, key; answers counted, errors answered
metrics.py      /metrics
app.py          the routes
sockets.py      the socket
server.py       uvicorn on a socket, until a signal
page/           the page at /
"""
