//! Kernel programs of a few instructions, written by hand: what makes frames and counts them shall cost nothing.

/// A register.
pub(super) type Register = u8;

/// The registers of a program's beginning and end.
pub(super) const R0: Register = 0;
pub(super) const R1: Register = 1;
pub(super) const R2: Register = 2;
pub(super) const R3: Register = 3;
pub(super) const R4: Register = 4;
pub(super) const R5: Register = 5;
pub(super) const R6: Register = 6;

/// Behind the stack's end.
pub(super) const R10: Register = 10;

/// How wide an access is.
#[derive(Clone, Copy)]
pub(super) enum Width {
    Half = 0x08,
    Word = 0x00,
    Byte = 0x10,
    Double = 0x18,
}

/// What is reckoned; with a constant, or with a register.
#[derive(Clone, Copy)]
pub(super) enum Operation {
    Add = 0x00,
    Multiply = 0x20,
    And = 0x50,
    ShiftRight = 0x70,
    Modulo = 0x90,
    Xor = 0xa0,
    Move = 0xb0,
}

/// When a jump is taken.
#[derive(Clone, Copy)]
pub(super) enum Condition {
    NotEqual = 0x50,
    Greater = 0x20,
}

/// A program under construction. Jumps go forward to one label, the program's last part.
#[derive(Default)]
pub(super) struct Program {
    code: Vec<u64>,
    jumps: Vec<usize>,
}

impl Program {
    fn push(&mut self, operation: u8, to: Register, from: Register, offset: i16, value: i32) -> &mut Self {
        let [low, high] = offset.to_le_bytes();
        let [a, b, c, d] = value.to_le_bytes();
        self.code.push(u64::from_le_bytes([operation, from << 4 | to, low, high, a, b, c, d]));
        self
    }

    /// `to` and a constant, 64 bits wide.
    pub(super) fn with(&mut self, operation: Operation, to: Register, value: i32) -> &mut Self {
        self.push(operation as u8 | 0x07, to, 0, 0, value)
    }

    /// `to` and a register, 64 bits wide.
    pub(super) fn by(&mut self, operation: Operation, to: Register, from: Register) -> &mut Self {
        self.push(operation as u8 | 0x0f, to, from, 0, 0)
    }

    /// A constant of 64 bits.
    pub(super) fn constant(&mut self, to: Register, value: u64) -> &mut Self {
        self.wide(to, 0, value)
    }

    /// The address of the first value of an array map.
    pub(super) fn value_of(&mut self, to: Register, map: i32) -> &mut Self {
        self.wide(to, 2, u64::from(map.cast_unsigned()))
    }

    /// A map.
    pub(super) fn map(&mut self, to: Register, map: i32) -> &mut Self {
        self.wide(to, 1, u64::from(map.cast_unsigned()))
    }

    fn wide(&mut self, to: Register, kind: Register, value: u64) -> &mut Self {
        #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
        let (low, high) = ((value as u32).cast_signed(), ((value >> 32) as u32).cast_signed());
        self.push(0x18, to, kind, 0, low).push(0, 0, 0, 0, high)
    }

    /// Reads from memory.
    pub(super) fn load(&mut self, width: Width, to: Register, from: Register, offset: i16) -> &mut Self {
        self.push(width as u8 | 0x61, to, from, offset, 0)
    }

    /// Writes to memory.
    pub(super) fn store(&mut self, width: Width, to: Register, offset: i16, from: Register) -> &mut Self {
        self.push(width as u8 | 0x63, to, from, offset, 0)
    }

    /// Adds a register to 64 bits of memory at once.
    pub(super) fn add_to_memory(&mut self, to: Register, offset: i16, from: Register) -> &mut Self {
        self.push(0xdb, to, from, offset, 0)
    }

    /// The lower 16 or 32 bits in the network's order.
    pub(super) fn reorder(&mut self, to: Register, bits: i32) -> &mut Self {
        self.push(0xdc, to, 0, 0, bits)
    }

    /// Goes to the last part if a register is so, compared with a constant.
    pub(super) fn end_if(&mut self, condition: Condition, left: Register, right: i32) -> &mut Self {
        self.jumps.push(self.code.len());
        self.push(condition as u8 | 0x05, left, 0, 0, right)
    }

    /// Goes to the last part if a register is so, compared with another one.
    pub(super) fn end_if_by(&mut self, condition: Condition, left: Register, right: Register) -> &mut Self {
        self.jumps.push(self.code.len());
        self.push(condition as u8 | 0x0d, left, right, 0, 0)
    }

    /// Calls a helper.
    pub(super) fn call(&mut self, helper: i32) -> &mut Self {
        self.push(0x85, 0, 0, 0, helper)
    }

    /// Ends with a result.
    pub(super) fn returns(&mut self, result: i32) -> &mut Self {
        self.with(Operation::Move, R0, result).push(0x95, 0, 0, 0, 0)
    }

    /// The program, which has no jumps, ends with what is in the first register.
    pub(super) fn exit(&mut self) -> Vec<u64> {
        self.push(0x95, 0, 0, 0, 0);
        std::mem::take(&mut self.code)
    }

    /// The last part, where the jumps lead: ends with a result.
    pub(super) fn last(&mut self, result: i32) -> Vec<u64> {
        for jump in &self.jumps {
            let offset = u16::try_from(self.code.len() - jump - 1).unwrap_or_default();
            self.code[*jump] |= u64::from(offset) << 16;
        }
        self.returns(result);
        std::mem::take(&mut self.code)
    }
}
