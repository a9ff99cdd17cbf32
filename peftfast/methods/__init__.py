"""The adapter methods; importing this registers them. Variants come after what they vary."""

from peftfast.methods import loftq as loftq
from peftfast.methods import lora as lora
from peftfast.methods import p_tuning as p_tuning
from peftfast.methods import prefix_tuning as prefix_tuning
from peftfast.methods import prompt_tuning as prompt_tuning
from peftfast.methods import trainable_tokens as trainable_tokens

from peftfast.methods import dora as dora  # isort: skip
from peftfast.methods import adalora as adalora
from peftfast.methods import alora as alora
from peftfast.methods import arrow as arrow
from peftfast.methods import bdlora as bdlora
from peftfast.methods import corda as corda
from peftfast.methods import ia3 as ia3
from peftfast.methods import kasa as kasa
from peftfast.methods import lora_ga as lora_ga
from peftfast.methods import monteclora as monteclora
from peftfast.methods import qalora as qalora
from peftfast.methods import velora as velora
