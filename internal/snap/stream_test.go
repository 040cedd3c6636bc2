package snap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/iotest"

	"example.com/raft/internal/vfs"
)

// encoded returns the bytes of a snapshot that was written as a stream.
func encoded(t testing.TB, header, data []byte, salt uint64, block int) []byte {
	t.Helper()
	var b bytes.Buffer
	e, err := newEncoder(&b, header, salt, block)
	if err != nil {
		t.Fatal(err)
	}
	for at, piece := 0, 1; at < len(data); piece = piece*3 + 1 {
		n, err := e.Write(data[at:min(at+piece, len(data))])
		if err != nil {
			t.Fatal(err)
		}
		at += n
	}
	if err := e.Finish(); err != nil || e.Size() != int64(len(data)) {
		t.Fatalf("Finish: %v, %d bytes of %d", err, e.Size(), len(data))
	}
	return b.Bytes()
}

// decode reads a whole stream.
func decode(r io.Reader) (header, data []byte, err error) {
	d, err := NewDecoder(r, "stream")
	if err != nil {
		return nil, nil, err
	}
	data, err = io.ReadAll(d)
	return d.Header(), data, err
}

// decodeAgrees tells what is wrong if a Decoder takes a file for something else
// than Open and ReadAt do.
func decodeAgrees(file, header, data []byte, whole bool) error {
	h, p, err := decode(bytes.NewReader(file))
	switch {
	case err != nil && typed(err) != refused:
		return fmt.Errorf("a Decoder gives an untyped error: %w", err)
	case whole != (err == nil):
		return fmt.Errorf("whole for a Reader: %v, and a Decoder says: %v", whole, err)
	case h != nil && whole && !bytes.Equal(h, header), len(p) > len(data) || !bytes.Equal(p, data[:len(p)]), whole && len(p) != len(data):
		return errors.New("a Decoder gives out other bytes")
	}
	return nil
}

func fileBytes(fs vfs.FS, name string) ([]byte, error) {
	f, err := fs.Open(testDir + "/" + name + suffix)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	_, err = io.ReadFull(io.NewSectionReader(f, 0, size), b)
	return b, err
}

// A stream is, byte for byte, the file; and is read in whatever pieces it comes.
func TestStream(t *testing.T) {
	for _, size := range []int{0, 1, 63, 64, 65, 127, 128, 129, 1000} {
		header, data := payload(1, size%7), payload(2, size)
		fs := newMem(1)
		write(t, fs, "a", header, data, 5, 64)
		file, err := fileBytes(fs, "a")
		if err != nil {
			t.Fatal(err)
		}
		stream := encoded(t, header, data, 5, 64)
		if !bytes.Equal(file, stream) {
			t.Fatalf("%d bytes: the stream is not the file", size)
		}
		for name, r := range map[string]io.Reader{
			"whole": bytes.NewReader(stream), "bytes": iotest.OneByteReader(bytes.NewReader(stream)),
			"halves": iotest.HalfReader(bytes.NewReader(stream)), "eof": iotest.DataErrReader(bytes.NewReader(stream)),
		} {
			h, p, err := decode(r)
			if err != nil || !bytes.Equal(h, header) || !bytes.Equal(p, data) {
				t.Errorf("%d bytes, %s: %d bytes, %v", size, name, len(p), err)
			}
		}
	}
}

// A stream that is cut off at any length, one with anything behind its end, and
// one with any bit turned over is refused, with an error that says where; and
// what a Decoder gave out before that is right.
func TestStreamDamage(t *testing.T) {
	header, data := payload(1, 9), payload(2, 200)
	whole := encoded(t, header, data, 5, 64)
	try := func(what string, b []byte) {
		t.Helper()
		if err := decodeAgrees(b, header, data, false); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := range whole {
		try(fmt.Sprintf("cut off at %d", n), whole[:n])
		for bit := range 8 {
			b := bytes.Clone(whole)
			b[n] ^= 1 << bit
			try(fmt.Sprintf("bit %d of byte %d", bit, n), b)
		}
	}
	for n := 1; n < 150; n++ {
		try(fmt.Sprintf("%d zeros behind it", n), append(bytes.Clone(whole), make([]byte, n)...))
		try(fmt.Sprintf("%d of its own bytes behind it", n), append(bytes.Clone(whole), whole[:n]...))
		try(fmt.Sprintf("its last %d bytes twice", n), append(bytes.Clone(whole), whole[len(whole)-n:]...))
	}
	var corrupt *CorruptError
	if _, _, err := decode(bytes.NewReader(whole[:len(whole)-1])); !errors.As(err, &corrupt) || corrupt.File != "stream" {
		t.Errorf("the error of a cut stream is %v", err)
	}
}

var errPipe = errors.New("broken pipe")

// failAfter is a writer and a reader that fails after n bytes.
type failAfter struct {
	n int
	r io.Reader
}

func (f *failAfter) Write(p []byte) (int, error) {
	n := min(len(p), f.n)
	if f.n -= n; n < len(p) {
		return n, errPipe
	}
	return n, nil
}

func (f *failAfter) Read(p []byte) (int, error) {
	if f.n == 0 {
		return 0, errPipe
	}
	n, err := f.r.Read(p[:min(len(p), f.n)])
	f.n -= n
	return n, err
}

// The errors of what is below come through, are kept, and are no verdict on
// the snapshot.
func TestStreamFails(t *testing.T) {
	data := payload(2, 200)
	whole := encoded(t, nil, data, 5, 64)
	for n := range whole {
		e, err := newEncoder(&failAfter{n: n}, nil, 5, 64)
		if err == nil {
			_, err = e.Write(data)
		}
		if err == nil {
			err = e.Finish()
		}
		if !errors.Is(err, errPipe) || !errors.Is(e.Finish(), errPipe) || !errors.Is(second(e.Write(data)), errPipe) {
			t.Fatalf("a writer that fails after %d bytes: %v", n, err)
		}
		_, p, err := decode(&failAfter{n: n, r: bytes.NewReader(whole)})
		if !errors.Is(err, errPipe) || typed(err) == refused || !bytes.Equal(p, data[:len(p)]) {
			t.Fatalf("a reader that fails after %d bytes: %v", n, err)
		}
	}
	if _, err := NewEncoder(io.Discard, make([]byte, MaxHeaderBytes+1), 1); err == nil {
		t.Error("a header that no reader takes is written")
	}
}
