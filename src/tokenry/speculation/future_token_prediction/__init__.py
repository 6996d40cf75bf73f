"""Future token prediction: one state vector at each position that decodes the next N tokens (arXiv 2410.18160).

model      the configuration, the decoder of a state vector, the whole model; read it first
drafter    the method: the decoder drafts, the target verifies
training   `tokenry train ftp`: a decoder for a model that is there, or a model of its own
measure    what a state says of the tokens ahead, and how smoothly states follow each other
"""

from tokenry.speculation.future_token_prediction.drafter import FutureTokenPrediction
from tokenry.speculation.future_token_prediction.model import FTPConfig, FTPDecoder, FTPForCausalLM, FTPOutput

__all__ = ["FTPConfig", "FTPDecoder", "FTPForCausalLM", "FTPOutput", "FutureTokenPrediction"]
