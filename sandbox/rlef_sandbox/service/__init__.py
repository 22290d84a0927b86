"""Grading over HTTP: a server around one Sandbox, and the client that spreads work over several.

The only part of rlef_sandbox that needs more than the standard library: aiohttp, the extra `serve`.
Nothing is imported here, so that the command line and the trainer load it only where it is asked
for. `wire.py` is what travels, `grading_queue.py` what waits, `server.py` and `client.py` the ends.
"""
