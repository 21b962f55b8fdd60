"""Imported by the fork server of loader processes, and nowhere else: it and they shall outlive a SIGTERM.

Queues and launchers send SIGTERM to all processes of a job. The training process then needs batches until it has come
to a checkpoint; it ends its loader processes itself.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
