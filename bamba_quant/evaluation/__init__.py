"""What quantized files lost: text to chunks to figures, with intervals, a noise floor, drift and gates."""
