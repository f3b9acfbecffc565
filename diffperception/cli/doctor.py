"""`diffperception doctor`."""

from diffperception import doctor
from diffperception.echo import echo
from diffperception.table import format_table


def command() -> int:
    """Say what this machine has: versions, devices, which packages are missing or too old, and what installs them.

    It is what a report of an error should begin with. The exit code is 1 if something that everybody needs is missing.
    """
    echo(format_table(doctor.about_machine(), ["", ""]) + "\n")
    needs = doctor.needs()
    rows = [[n.package.name, n.installed, str(n.package.specifier), n.extra, "" if n.fits else n.remedy] for n in needs]
    echo(format_table(rows, ["package", "installed", "needed", "extra", "to do"]) + "\n")
    plug_ins = [[module, "yes" if there else "no"] for module, there in doctor.neighbours()]
    echo(format_table(plug_ins, ["neighbour", "there"]))
    wanting = [n.package.name for n in needs if not n.fits and not n.extra]
    if wanting:
        echo(f"\nmissing or too old: {', '.join(wanting)}")
    return int(bool(wanting))
