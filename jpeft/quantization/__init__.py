"""Quantized bases, for any model and method: `quantize`, `dequantize` and LoftQ."""

from jpeft.core.quantized import Quantized as Quantized
from jpeft.core.quantized import dequantize_leaf as dequantize_leaf
from jpeft.core.quantized import quantize_array as quantize_array
from jpeft.core.schemes import SCHEMES as SCHEMES
from jpeft.quantization.loftq import loftq as loftq
from jpeft.quantization.tree import dequantize as dequantize
from jpeft.quantization.tree import is_quantized as is_quantized
from jpeft.quantization.tree import quantize as quantize
from jpeft.quantization.tree import unquantized as unquantized
