"""Redis streams: tickets out, groups back. With cluster/redis_server.py the only home of `redis`.

connection    reaching a server or a cluster, and saying what is wrong when that fails
streams       the keys of one attempt of a run; the life of every queue is drawn there
reader        a learner rank's cursors over its shards
"""

from protocol.stream.connection import Client, connect, redacted_url, server_facts, url_of
from protocol.stream.reader import Arrival, DeadLetter, GroupReader
from protocol.stream.streams import Claim, QueueDepth, Streams

__all__ = [
    "Arrival",
    "Claim",
    "Client",
    "DeadLetter",
    "GroupReader",
    "QueueDepth",
    "Streams",
    "connect",
    "redacted_url",
    "server_facts",
    "url_of",
]
