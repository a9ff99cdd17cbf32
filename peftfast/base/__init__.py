"""Storage formats of frozen base weights; importing this registers them. The last one registered is asked first."""

from peftfast.base import opaque as opaque

# isort: split
from peftfast.base import dense as dense

# isort: split
from peftfast.base import bnb4 as bnb4
from peftfast.base import hqq as hqq
from peftfast.base import int8 as int8
from peftfast.base import quanto as quanto
from peftfast.base import scaled as scaled
from peftfast.base.weight import BaseWeight as BaseWeight
from peftfast.base.weight import base_weight as base_weight
