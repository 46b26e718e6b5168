"""Adapter kinds: a PEFT family plus the rule for which of its tensors train and travel. One file per kind."""
