"""Where adapters act; importing this registers every kind of module that can carry one."""

from peftfast.sites import attention as attention
from peftfast.sites import conv as conv
from peftfast.sites import embedding as embedding
from peftfast.sites import linear as linear
from peftfast.sites.site import Dense as Dense
from peftfast.sites.site import Site as Site
from peftfast.sites.site import Slot as Slot
from peftfast.sites.site import bias_of as bias_of
from peftfast.sites.site import has_site as has_site
from peftfast.sites.site import make_site as make_site
from peftfast.sites.site import parts_of as parts_of
