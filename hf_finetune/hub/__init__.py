"""Uploading a finished adapter to the Hub: what may leave, the process that sends it, and how often it is tried.

- secrets, transport: tokens that are known to this process, texts without them; errors of the connection
- allowed, outgoing: which files leave, and what in them is changed or refused
- order: what the uploading process is told, and what it answers
- upload, commit: the uploading process; its tries and deadline, and what one try does
- sending: starts it, listens to it, ends it
- push: a finished run; the verb and the end of training
- best: the best checkpoint so far, while training goes on
"""
