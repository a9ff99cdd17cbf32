"""LoRA and its variants; importing this registers them, after what they vary."""

from peftfast.methods.lora import loftq as loftq
from peftfast.methods.lora import lora as lora

from peftfast.methods.lora import dora as dora  # isort: skip
from peftfast.methods.lora import alora as alora
from peftfast.methods.lora import arrow as arrow
from peftfast.methods.lora import bdlora as bdlora
from peftfast.methods.lora import corda as corda
from peftfast.methods.lora import kasa as kasa
from peftfast.methods.lora import lora_ga as lora_ga
from peftfast.methods.lora import monteclora as monteclora
from peftfast.methods.lora import qalora as qalora
from peftfast.methods.lora import velora as velora
