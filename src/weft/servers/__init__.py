"""A parameter server on paper: which part of the model each server holds (ranges), who works on what and when (ledger), what they tell
each other (messages). No torch, no sockets: pure decisions, tested by themselves."""
