"""placeholder until parallel lands"""


class Group: ...
