"""Adapters: what is trained, what travels, and how it is written down.

The modules, in the order in which a round meets them: :mod:`~fedpeft.adapters.fingerprint` names the frozen base,
:mod:`~fedpeft.adapters.kinds` says which tensors of an adapter train and travel, :mod:`~fedpeft.adapters.seeded`
regenerates the ones that do not, :mod:`~fedpeft.adapters.attach` puts an adapter on a model,
:mod:`~fedpeft.adapters.delta` packs a client's change into one content-addressed object,
:mod:`~fedpeft.adapters.validation` decides whether the coordinator takes it, and
:mod:`~fedpeft.adapters.peft_folder` exchanges adapters with stock Hugging Face PEFT.
"""
