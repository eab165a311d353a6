"""What a vision-language model is: functions of tensors, which know nothing of flags and files of data."""

import machine as machine  # sets what OpenMP reads once, when torch is loaded
