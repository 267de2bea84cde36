"""Token-stream engine: visible tokens of many samples share one packed axis.

Every matrix product, norm and MLP runs on `[tokens, width]`; tokens are gathered into rows of a
few fixed lengths only around attention and the losses. Programs are keyed by capacity (a rung of
the ladder), never by grid or patch size, so samples of different shapes share one program.
"""
