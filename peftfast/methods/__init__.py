"""The adapter methods; importing this registers them. What others vary comes first."""

from peftfast.methods import lora as lora  # isort: skip
from peftfast.methods import adalora as adalora
from peftfast.methods import ia3 as ia3
from peftfast.methods import p_tuning as p_tuning
from peftfast.methods import prefix_tuning as prefix_tuning
from peftfast.methods import prompt_tuning as prompt_tuning
from peftfast.methods import trainable_tokens as trainable_tokens
