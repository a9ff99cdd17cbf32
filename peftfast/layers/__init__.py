"""What stands in for a module of the base model: layers with adapters, by kind, and wrappers of modules that train
beside them. Importing this registers every kind of layer."""

from peftfast.layers import attention as attention
from peftfast.layers import kinds as kinds
