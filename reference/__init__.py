"""The specification: the language model, its training loop, clip and decoder from scratch, in tensor operations only.

Every kernel and every fast path of the library is checked against this package. It imports torch alone.
"""
