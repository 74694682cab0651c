"""Pure functions of reinforcement learning from human feedback: tensors in, tensors out, torch and nothing else.

Legend of shape suffixes, here and in all of `learner`: B sequences, T response tokens (padded right), L whole sequence
tokens (prompt and response, padded right), N valid tokens. `mask_BT` is 1 on valid response tokens and comes from
lengths. Log-probabilities and KL are in nats.
"""
