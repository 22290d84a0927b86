"""Grading over HTTP: a server around one Sandbox, and the client that spreads work over several.

The only part of rlef_sandbox that needs more than the standard library: aiohttp, the extra `serve`.
Nothing is imported here, so the command line and the trainer load it only when they need it.
`wire.py` defines the messages, `grading_queue.py` the queue, `server.py` and `client.py` the ends.
"""
