"""Groups of a row as integers of 4 or 8 bits with a scale each, in compressed-tensors' and torchao's layouts."""

from bamba_quant.codecs.integers import pack_quantized, torchao_plain, torchao_tiles

CODECS = (*pack_quantized.CODECS, *torchao_plain.CODECS, *torchao_tiles.CODECS)
