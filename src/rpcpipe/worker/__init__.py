"""The worker process: a mailbox that orders messages, one compute thread, and the actor that holds stages."""
