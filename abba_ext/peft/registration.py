"""Makes "ABBA" known to PEFT: a member of its enum of methods, and the classes that belong to it."""
try:
    import peft
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError("abba_ext.peft needs PEFT: pip install 'abba_ext[peft]'") from None
from packaging.version import Version

MINIMUM = "0.21"
if Version(peft.__version__) < Version(MINIMUM):
    raise ImportError(f"abba_ext.peft needs PEFT {MINIMUM} or newer, found {peft.__version__}: pip install -U 'abba_ext[peft]'")

from peft import PeftType  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.utils import register_peft_method  # noqa: E402

NAME = "ABBA"


def add_peft_type(name: str) -> PeftType:
    """The member of that name of PEFT's enum of methods, which is added if PEFT does not have it.

    PEFT looks methods up by members of this enum and offers no way to extend it, so the member is entered where Python's
    enum keeps its members: PeftType(name), PeftType[name], PeftType.<name>, iteration, copying and pickling work.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    setattr(PeftType, name, member)  # before the map has it: an enum refuses to reassign what it knows as a member
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Registers the method with its classes; does nothing if that has been done.

    Raises:
        ImportError: PEFT has a method of this name that is not this one.
    """
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type(NAME))
    if present is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    elif (present.__module__, present.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise ImportError(f"PEFT {peft.__version__} has a method {NAME} already, {present.__module__}.{present.__qualname__}; "
                          "use that one, or abba_ext.patch_model")
