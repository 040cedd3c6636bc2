package snap

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"
)

// FuzzOpen opens a file that holds anything, and decodes it as a stream: both
// must say the same. With fix it makes the checksums right first, so that the
// fuzzer gets past them. Neither may panic, both must give typed errors; and
// what reads whole must be, byte for byte, the file that Create writes for that
// header and payload.
func FuzzOpen(f *testing.F) {
	fs := newMem(1)
	for i, c := range []struct{ header, data, block int }{{0, 0, 64}, {5, 0, 64}, {0, 1, 64}, {9, 64, 64}, {9, 150, 64}, {1, 10, 1}} {
		write(f, fs, "a", payload(1, c.header), payload(2, c.data), uint64(i), c.block)
		whole := fileOf(f, fs, "a")
		f.Add(whole, false)
		f.Add(whole, true)
		f.Add(whole[:len(whole)-1], true)
		f.Add(append(whole[:len(whole):len(whole)], whole[headSize:]...), true)
	}
	f.Add([]byte{}, true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if len(b) > 1<<16 {
			return
		}
		if fix {
			b = fixChecksums(append([]byte(nil), b...))
		}
		fs := newMem(1)
		setFile(t, fs, "a", b)
		h, p, decodeErr := decode(bytes.NewReader(b))
		if decodeErr != nil && typed(decodeErr) != refused {
			t.Fatalf("an untyped error of a Decoder: %v", decodeErr)
		}
		r, err := Open(fs, testDir, "a")
		if err != nil {
			if typed(err) != refused {
				t.Fatalf("an untyped error: %v", err)
			}
			if decodeErr == nil {
				t.Fatalf("a Decoder takes what Open refuses: %v", err)
			}
			return
		}
		defer r.Close()
		if r.Size() > int64(len(b)) {
			t.Fatalf("%d bytes of payload in a file of %d", r.Size(), len(b))
		}
		data, err := io.ReadAll(io.NewSectionReader(r, 0, r.Size()))
		if err != nil {
			if typed(err) != refused {
				t.Fatalf("an untyped error: %v", err)
			}
			if decodeErr == nil {
				t.Fatalf("a Decoder takes what a Reader refuses: %v", err)
			}
			return
		}
		if decodeErr != nil || !bytes.Equal(h, r.Header()) || !bytes.Equal(p, data) {
			t.Fatalf("a Decoder reads something else than a Reader: %v", decodeErr)
		}
		write(t, fs, "b", r.Header(), data, r.head.salt, int(r.head.blockSize))
		if again := fileOf(t, fs, "b"); !bytes.Equal(again, b) {
			t.Fatalf("a file that nothing writes is accepted:\n% x\nshould be\n% x", b, again)
		}
		last := make([]byte, 1)
		if n, err := r.ReadAt(last, r.Size()-1); r.Size() > 0 && (n != 1 || err != nil || last[0] != data[len(data)-1]) {
			t.Fatalf("the last byte differs when it is read alone: %v", err)
		}
	})
}

// fixChecksums makes the checksums of a file right, as far as its structure
// allows.
func fixChecksums(b []byte) []byte {
	if len(b) < headSize+endSize {
		return b
	}
	copy(b, Magic)
	le := binary.LittleEndian
	salt, bs, header := le.Uint64(b[16:]), int64(le.Uint32(b[24:])), int64(le.Uint32(b[28:]))
	endAt := int64(len(b) - endSize)
	if header <= endAt-headSize {
		le.PutUint32(b[32:], checksum(0, b[headSize:headSize+header]))
	}
	le.PutUint32(b[8:], checksum(0, b[12:headSize]))
	sums := checksum(0, b[8:12])
	for at := headSize + header; bs > 0 && at+sumSize < endAt; at += sumSize + bs {
		le.PutUint32(b[at:], checksum(placed(salt, at), b[at+sumSize:min(at+sumSize+bs, endAt)]))
		sums = checksum(sums, b[at:at+sumSize])
	}
	e := b[endAt:]
	copy(e, endMagic)
	le.PutUint32(e[12:], sums)
	le.PutUint32(e[8:], checksum(placed(salt, endAt), e[12:]))
	return b
}
