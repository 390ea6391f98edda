# dirty.S - a guest of one kilobyte that writes its memory, for migration tests.
#
#   qemu-system-x86_64 -kernel dirty.elf -append "FILL HOT SPIN" -serial file:console
#
# A multiboot ELF (32 bit, no paging), ready within a fraction of a second:
#   1. writes FILL MiB from BASE on, every dword different and none of them zero;
#   2. for ever: adds one to the first dword of each page of the first HOT MiB, after checking that
#      it holds what the pass before left there, with SPIN iterations of pause after each page.
#      With HOT 0 it is idle instead: it halts, and counts the timer's interrupts (100 a second).
# The last three numbers of the command line count, whatever stands before them.
#
# On COM1 it prints its passes in hexadecimal, a line at most every 2^28 ticks of the time stamp
# counter (0.1 to 0.3 s). From outside, HMP `xp /5wx 0x1f0000` shows MAGIC, READY, PASSES, WRITES
# and ERRORS.

        .set BASE, 0x00400000
        .set MAGIC, 0x001f0000          # "DIRT"
        .set READY, MAGIC + 4           # 1 as soon as step 2 has begun
        .set PASSES, MAGIC + 8          # over the hot range, or timer interrupts
        .set WRITES, MAGIC + 12         # to the hot range
        .set ERRORS, MAGIC + 16         # dwords that did not hold what the pass before left
        .set FILL, MAGIC + 32           # MiB
        .set HOT, MAGIC + 36            # MiB
        .set SPIN, MAGIC + 40
        .set PRINTED, MAGIC + 44        # time stamp counter / 2^28 at the last line
        .set STACK, MAGIC
        .set PATTERN, 0xa5a5a5a5        # for a dword: its address ^ PATTERN
        .set COM1, 0x3f8

        .code32
        .section .text
        .globl _start
        .align 4
        .long 0x1badb002, 0, -0x1badb002

_start: cli
        cld
        movl $STACK, %esp
        movl $MAGIC, %edi
        xorl %eax, %eax
        movl $16, %ecx
        rep stosl
        movl $0x44495254, MAGIC
        call read_command_line
        call fill
        movl $1, READY
        cmpl $0, HOT
        je idle

pass:   movl $BASE, %edi
        movl HOT, %edx
        shll $20, %edx
        addl %edi, %edx                 # end of the hot range
1:      movl %edi, %eax
        xorl $PATTERN, %eax
        addl PASSES, %eax
        cmpl %eax, (%edi)
        je 2f
        incl ERRORS
2:      movl %cr0, %ecx                 # a write to CR0.WP empties the TLB: QEMU 7.2 under TCG can
        xorl $0x10000, %ecx             # lose track of a page that is written while its dirty log
        movl %ecx, %cr0                 # is cleared, for as long as the page's entry stays there
        incl %eax
        movl %eax, (%edi)
        incl WRITES
        movl SPIN, %ecx
        jecxz 4f
3:      decl %ecx                       # not `pause`: TCG leaves its loop at each one
        jnz 3b
4:      addl $4096, %edi
        cmpl %edx, %edi
        jb 1b
        incl PASSES
        call progress
        jmp pass

# Halts between the interrupts of the timer.
idle:   movl $idt_pointer, %eax
        lidt (%eax)
        movl $timer, %eax               # vector 0x20: offset 15..0, selector, gate, offset 31..16
        movw %ax, idt + 0x20 * 8
        movw %cs, idt + 0x20 * 8 + 2
        movw $0x8e00, idt + 0x20 * 8 + 4
        shrl $16, %eax
        movw %ax, idt + 0x20 * 8 + 6
        movl $pic, %esi
1:      lodsw                           # port, value
        testb %al, %al
        jz 2f
        movzbl %al, %edx
        movb %ah, %al
        outb %al, %dx
        jmp 1b
2:      sti
3:      hlt
        call progress
        jmp 3b

timer:  pushl %eax
        incl PASSES
        movb $0x20, %al                 # end of interrupt
        outb %al, $0x20
        popl %eax
        iret

# Both interrupt controllers: vectors 0x20 and 0x28, all masked but the timer; the timer: mode 2,
# 1193182 Hz / 11932.
pic:    .byte 0x20, 0x11, 0x21, 0x20, 0x21, 0x04, 0x21, 0x01
        .byte 0xa0, 0x11, 0xa1, 0x28, 0xa1, 0x02, 0xa1, 0x01, 0x21, 0xfe, 0xa1, 0xff
        .byte 0x43, 0x34, 0x40, 11932 & 0xff, 0x40, 11932 >> 8, 0, 0

# In: %ebx, the multiboot information. Out: FILL, HOT, SPIN.
read_command_line:
        movl 16(%ebx), %esi
1:      xorl %ecx, %ecx                 # digits of this number
        xorl %edx, %edx                 # its value
2:      lodsb
        movzbl %al, %eax
        leal -'0'(%eax), %edi
        cmpl $9, %edi
        ja 3f
        imull $10, %edx
        addl %edi, %edx
        incl %ecx
        jmp 2b
3:      jecxz 4f
        movl HOT, %ecx
        movl %ecx, FILL
        movl SPIN, %ecx
        movl %ecx, HOT
        movl %edx, SPIN
4:      testl %eax, %eax
        jnz 1b
        ret

fill:   movl $BASE, %edi
        movl FILL, %ecx
        shll $18, %ecx                  # dwords
        jecxz 2f
1:      movl %edi, %eax
        xorl $PATTERN, %eax
        movl %eax, (%edi)
        addl $4, %edi
        decl %ecx
        jnz 1b
2:      ret

# Prints PASSES when the last line is old enough.
progress:
        rdtsc
        shrdl $28, %edx, %eax
        cmpl %eax, PRINTED
        je 3f
        movl %eax, PRINTED
        movl PASSES, %ebx
        movl $8, %ecx
1:      roll $4, %ebx
        movl %ebx, %eax
        andl $15, %eax
        movb digits(%eax), %al
        call put
        decl %ecx
        jnz 1b
        movb $'\n', %al
put:    movb %al, %ah
2:      movw $COM1 + 5, %dx
        inb %dx, %al
        testb $0x20, %al                # room for a byte (an absent port reads as ones)
        jz 2b
        movw $COM1, %dx
        movb %ah, %al
        outb %al, %dx
3:      ret

digits: .ascii "0123456789abcdef"
        .align 8
idt_pointer:
        .word 0x21 * 8 - 1
        .long idt
        .align 8
idt:    .fill 0x21, 8, 0
