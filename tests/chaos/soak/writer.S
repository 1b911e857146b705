# A guest in one sector: no operating system, next to no CPU time, and yet it runs, is paused, is reset and dies as
# any guest does. It goes on behind the last record that it finds, and every 220 ms, for each disk in turn:
#
#   1. overwrites 32 KiB of its bulk (block NUMBER * 37 mod 256, from BULK on) with NUMBER in every 32 bits,
#   2. writes record NUMBER, which is 512 bytes of NUMBER, at sector FIRST + NUMBER,
#   3. says "vda NUMBER" on its serial line: this is acknowledged.
#
# Its disks are writethrough, so what the BIOS has written is flushed. At its start it says "vda start NUMBER".

        .code16
        .set FIRST, 2047
        .set BULK, 36864
        .set BULK_SECTORS, 64
        .set BUFFER, 0x1000             # its segment
        .set DRIVES, 0x475              # of the BIOS: how many hard disks there are
        .set TICKS, 0x46c               # of the BIOS: 18.2 a second
        .set NUMBERS, 0x600             # of each disk the next one, 32 bits each
        .set LEAST, 0x5fc               # the least of them: a disk that is ahead of another after a crash waits for it

        .globl _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        sti
        cld

        movl    $-1, LEAST
        xor     %bp, %bp                # the disk
search: xor     %edi, %edi              # the last record that is there
        mov     $0x4000, %ebx
step:   mov     %edi, %eax
        or      %ebx, %eax
        push    %eax
        call    read
        pop     %eax
        jc      none                    # behind the end of the disk
        cmpl    $0, %es:0
        je      none
        mov     %eax, %edi
none:   shr     $1, %ebx
        jnz     step
        inc     %edi
        call    number
        mov     %edi, (%bx)
        cmp     LEAST, %edi
        jae     begin
        mov     %edi, LEAST
begin:  mov     $starts, %si
        call    tell
        inc     %bp
        mov     %bp, %ax
        cmp     DRIVES, %al
        jb      search

round:  mov     TICKS, %eax
wait:   hlt
        mov     TICKS, %ecx
        sub     %eax, %ecx
        cmp     $4, %ecx
        jb      wait
        xor     %bp, %bp
disk:   call    number
        mov     (%bx), %eax
        cmp     LEAST, %eax
        ja      next
        push    %eax
        mov     $BUFFER, %cx
        mov     %cx, %es
        mov     $BULK_SECTORS * 128, %cx
        xor     %di, %di
        rep stosl
        imul    $37, %eax, %eax
        movzbl  %al, %eax
        shl     $6, %eax                # times BULK_SECTORS
        add     $BULK, %eax
        mov     $BULK_SECTORS, %cx
        call    write
        pop     %eax
        jc      again
        push    %eax
        add     $FIRST, %eax
        mov     $1, %cx
        call    write
        pop     %eax
        jc      again
        call    number
        incl    (%bx)
        mov     %eax, %edi
        mov     $nothing, %si
        call    tell
next:   inc     %bp
        mov     %bp, %ax
        cmp     DRIVES, %al
        jb      disk
        incl    LEAST
        jmp     round
again:  hlt                             # an error: try it again
        jmp     disk

number: mov     %bp, %bx                # BX: where the next number of disk BP is
        shl     $2, %bx
        add     $NUMBERS, %bx
        ret

read:   add     $FIRST, %eax            # record EAX of disk BP into the buffer
        mov     $BUFFER, %cx
        mov     %cx, %es
        mov     $1, %cx
        mov     $0x42, %dh
        jmp     access
write:  mov     $0x43, %dh              # CX sectors from EAX on
access: mov     %eax, where
        mov     %cx, count
        mov     %dh, %ah
        xor     %al, %al
        mov     %bp, %dx
        or      $0x80, %dl
        mov     $packet, %si
        pushal
        push    %es
        int     $0x13
        pop     %es
        popal
        ret

tell:   push    %si                     # "vd", the disk, what is at SI, EDI in decimal
        mov     $'v', %al
        call    say
        mov     $'d', %al
        call    say
        mov     %bp, %ax
        add     $'a', %al
        call    say
        mov     $' ', %al
        call    say
        pop     %si
text:   lodsb
        test    %al, %al
        jz      digits
        call    say
        jmp     text
digits: mov     %edi, %eax
        mov     $10, %ecx
        push    $'\n'
divide: xor     %edx, %edx
        div     %ecx
        add     $'0', %dl
        push    %dx
        test    %eax, %eax
        jnz     divide
spell:  pop     %ax
        call    say
        cmp     $'\n', %al
        jne     spell
        ret

say:    push    %ax
        mov     $0x3fd, %dx
busy:   in      %dx, %al
        test    $0x20, %al
        jz      busy
        pop     %ax
        mov     $0x3f8, %dx
        out     %al, %dx
        ret

starts: .asciz  "start "
nothing: .asciz ""

packet: .byte   16, 0
count:  .word   1
        .word   0, BUFFER
where:  .long   0, 0

        .org    510
        .word   0xaa55
