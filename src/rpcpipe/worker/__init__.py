"""What runs in a worker process: a mailbox that orders messages, one compute thread, the actor that holds stages."""
