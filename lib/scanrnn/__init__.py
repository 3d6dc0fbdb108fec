"""scanrnn: a microscope for recurrent networks.

Small tools that measure what happens to states, gradients and Jacobians as they travel through time,
for any Equinox cell, together with the closed forms that predict the answer.
"""
